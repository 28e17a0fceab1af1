"""The node agent: attests the node, keeps SVIDs fresh, relays sign requests of local processes to the key cluster. It holds no workload key."""
