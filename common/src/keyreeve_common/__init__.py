"""What two Keyreeve processes must agree on: identities, schemes, purposes, errors, wire forms. No listening, no storage."""
