"""How a sharded vocabulary is reduced: autograd functions, their definition in plain torch, the choice of backend."""
