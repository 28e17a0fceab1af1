"""Alembic's entry: runs on the engine that `keyreeve_ca.store.engine.migrate` gives it, in one transaction."""

from alembic import context
from keyreeve_ca.store.schema import metadata

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
    with connection.begin():
        context.run_migrations()
