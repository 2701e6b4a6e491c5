"""One loop, one task object per thing trained."""
