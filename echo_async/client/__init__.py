"""The asyncio client, and what it shares with the blocking one: endpoint, verifier, batching, session."""
