"""Records in SQLite or PostgreSQL, through SQLAlchemy: the same code, the same tests."""
