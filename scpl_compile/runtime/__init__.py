"""All that an emitted program imports while it trains."""

__all__: list[str] = []
