"""What a process takes from itself before it meets foreign bytes. Each protection is on, or off for a reason that is said (ADR 11)."""
