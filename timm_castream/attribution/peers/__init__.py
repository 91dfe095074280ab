"""Methods of captum, pytorch-grad-cam and torch-cam by name, one adapter a library over its public interface."""

from .rows import LIBRARIES, check_library, is_peer, peer_method, peer_names, peers_that_fit, peers_that_work, why_not

__all__ = [
    'LIBRARIES',
    'check_library',
    'is_peer',
    'peer_method',
    'peer_names',
    'peers_that_fit',
    'peers_that_work',
    'why_not',
]
