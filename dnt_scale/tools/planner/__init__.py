"""`dnt plan`: what a run would take on a cluster that need not be at hand, as pure functions;
what a micro-batch costs and holds is in dnt_scale/costs/.

machine.py    ranks, their devices and links; what each kind of work reaches of their peaks
step_time.py  seconds of a step: a roofline of that work
goodput.py    what failures and checkpoints leave of the time
search.py     the best of the engines, meshes and micro-batches; the fewest GPUs
estimate.py   all of it for one run
rates.py      the same rates measured on this machine
"""
