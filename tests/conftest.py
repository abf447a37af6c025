"""One thread: the networks of the tests are so small that several only wait for each other."""
import torch

torch.set_num_threads(1)
