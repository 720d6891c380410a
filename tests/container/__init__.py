"""Images that are really built and really run, by podman, without a registry."""
