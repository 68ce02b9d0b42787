"""Kernels: the contrastive loss that every SCPL stage trains on. Imports torch only."""

from scpl_compile.kernels.supcon import SupConLoss, supcon_loss

__all__ = ["SupConLoss", "supcon_loss"]
