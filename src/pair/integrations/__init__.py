"""Adapters to other toolkits. Each imports its toolkit when it is called, not before."""
