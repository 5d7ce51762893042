"""Mixtures of experts: the router, the dispatch of tokens to experts and back, and the layers made
of them.
"""
