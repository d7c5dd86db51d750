"""The hypervisor: owns machine memory and every table, arbitrates hypercalls, delivers events.

This package's root imports nothing, so that a guest may import `hypervisor.public`, the contract, and nothing else.
"""
