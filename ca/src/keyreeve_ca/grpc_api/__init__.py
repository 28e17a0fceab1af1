"""The CA over gRPC: for nodes that attest, for agents, for administrators."""
