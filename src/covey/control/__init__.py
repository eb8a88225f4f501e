"""Pure decisions about the cluster: it could run with the cable out and the clock stopped."""
