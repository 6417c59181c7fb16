"""Measuring a server: `load` (arrivals) -> `target` (whom they ask) -> `report` (what it felt like)."""
