"""The guest library: what a paravirtual kernel is written against. It imports the contract and ringlib, no more."""
