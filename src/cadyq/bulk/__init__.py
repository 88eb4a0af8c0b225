"""Many pictures from a folder or URL into another, on this machine or on many at a time; see docs/bulk.md."""

from cadyq.bulk.order import Item, Order, find_items, make_order
from cadyq.bulk.run import Cluster, run_bulk

__all__ = ["Cluster", "Item", "Order", "find_items", "make_order", "run_bulk"]
