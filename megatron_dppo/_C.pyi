# What csrc/binding.cpp compiles to. Importing it registers torch.ops.megatron_dppo.

cuda_archs: str  # such as "80;90a;100+PTX"; empty where only the CPU kernels are in
compiler: str
flags: str
torch_version: str  # compiled against
num_totals: int  # numbers in the totals of torch.ops.megatron_dppo.token_update
