"""What actors say to each other: typed messages, and one service class per actor kind."""
