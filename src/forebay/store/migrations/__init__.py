"""The steps of the schema, oldest first, run by `store.database` alone."""
