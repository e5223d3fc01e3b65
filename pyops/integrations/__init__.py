"""Doors for other libraries' users: torch's flash attention registry and others."""
