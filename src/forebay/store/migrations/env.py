"""What Alembic runs to bring a schema up to date, on the connection that `store.database` hands it.

It refuses to open a connection or a transaction of its own, and to configure logging.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
