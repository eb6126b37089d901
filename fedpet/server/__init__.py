"""One round on the server: sample, request, collect, check, aggregate."""
