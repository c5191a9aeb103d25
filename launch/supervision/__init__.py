"""The processes of a job, on every host: one that watches, one guard for each rank."""
