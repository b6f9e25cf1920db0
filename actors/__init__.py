"""The actors: plain async classes that implement a service. They know nothing of Ray, gRPC or any method."""
