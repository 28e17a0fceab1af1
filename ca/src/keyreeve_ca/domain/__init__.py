"""What the CA decides: entries, attestation, profiles, issuance, authorities. Pure: time, serials and entropy come in as arguments."""
