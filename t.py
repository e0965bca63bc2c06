import os; os.environ["TRITON_INTERPRET"]="1"
import torch, triton, triton.language as tl
@triton.jit
def f(a, C: tl.constexpr):
    ptr, out, n, opt = a
    x = tl.load(ptr + tl.arange(0, C[0]), mask=tl.arange(0,C[0])<n, other=0.)
    if opt is not None:
        x += 1
    tl.store(out + tl.arange(0,C[0]), x.to(out.dtype.element_ty))
@triton.jit
def k(a, b, C: tl.constexpr, D: tl.constexpr):
    if tl.program_id(2) == 0:
        f(a, C)
    elif b is not None:
        f(b, D)
x=torch.randn(16); y=torch.empty(16,dtype=torch.bfloat16); z=torch.empty(32); x2=torch.randn(32)
k[(1,1,1)]((x,y,16,x), None, (16,), None)
print((y-x-1).abs().max(), (y==(x+1).bfloat16()).all())
k[(1,1,2)]((x,y,16,None), (x2,z,32,x), (16,), (32,))
print((y==x.bfloat16()).all(), (z-x2-1).abs().max(), triton.__version__)
