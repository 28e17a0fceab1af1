"""The key-holding process: frames in, judged messages signed, frames out. It has no network code (docs/protocol/signer-frames.md)."""
