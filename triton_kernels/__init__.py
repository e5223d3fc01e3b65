"""The Triton implementations, one module per op: kernels, configs and launchers.

Nothing here knows autograd or torch.library; importing a module needs Triton, importing this
package does not.
"""
