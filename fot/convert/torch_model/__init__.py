"""The PyTorch model that ships inside an exported checkpoint; its files import torch and transformers only."""
