"""Kernels: the contrastive loss that every SCPL stage trains on. Imports torch; Triton lazily."""

from scpl_compile.kernels.supcon import SupConLoss, forward_with_grad, supcon_loss

__all__ = ["SupConLoss", "forward_with_grad", "supcon_loss"]
