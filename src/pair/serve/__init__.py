"""The service (``pair serve``), its client, and the page for people (``pair lab``)."""
