"""How files are opened: local or in an object store, packed or plain, in whatever encoding they were saved."""
