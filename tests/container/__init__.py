"""Images that are really built and really run, by podman from Debian's or Ubuntu's packages, without a registry."""
