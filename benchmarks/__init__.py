"""The measured claims: `fastpref bench`, and the scripts behind the committed results.

fastpref/benchmarks is a link to this folder: an installed package has it as fastpref.benchmarks.
"""
