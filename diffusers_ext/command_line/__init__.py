"""The console command `diffusers-ext`; what it does is the library's."""
