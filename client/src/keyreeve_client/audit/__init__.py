"""Reading the signer's audit log: verification, search, proofs, cosignatures. It needs the directory, or a copy of it, and no service."""
