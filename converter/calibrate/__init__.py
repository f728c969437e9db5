"""What a text shows of the float model: Hessians of the linears' inputs, gradients and their Fisher information."""
