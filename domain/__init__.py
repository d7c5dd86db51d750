"""The guest library: what a paravirtual kernel is written against. It imports the contract and ringlib, nothing else of ours."""
