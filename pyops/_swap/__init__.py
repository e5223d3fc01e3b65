"""How `pyops.optimize` finds patterns in models and puts guarded fused calls in their place.

report.py      what was done, as the user sees it
guard.py       what makes it safe to bypass a module's own call
pattern.py     a chain of calls that one op can stand in for: recognition, and the guarded call
conv_pool.py   the chain conv → activation → pool
activations.py what the chains have in common
source.py      from a function to its verified syntax tree and back
tree.py        questions about parts of a syntax tree
resolve.py     what the names in a forward stand for
chains.py      finds chains of calls in a syntax tree and rewrites each into one call
sequential.py  the same for the contents of an nn.Sequential
lstm.py        a guarded forward for nn.LSTM
"""
