"""One script per method: a Config, the method's own pure maths, and `async def run(cluster, config)`."""
