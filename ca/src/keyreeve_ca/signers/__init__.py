"""Where signatures come from: the key cluster, or keys in this process for development and tests."""
