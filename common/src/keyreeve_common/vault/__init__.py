"""HashiCorp Vault and OpenBao, for the processes that reach one: where it is, how to log in, what its errors mean to us.

`config` and `errors` load no network. `session` loads hvac, which is an extra: only a process whose work it is imports it.
"""
