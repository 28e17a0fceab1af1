"""The one command, `keyreeve`: administration by the services' local sockets, starting a service, checking an installation."""
