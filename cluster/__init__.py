"""Where actors live: handles, transports, replicas, run directories, steps. The only room that imports ray."""
