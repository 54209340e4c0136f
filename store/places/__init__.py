"""Objects of a store where they lie: a directory, the web, a bucket, the hub."""
