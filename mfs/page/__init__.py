"""What a person looks at in a browser: the daemon's page, and the timeline of a load as a drawing.

timeline   one load as SVG; pure, `mfs explain --html` draws with it too
site       the page's door: who may ask for what, and the files the page is made of
where      its address and token, for `mfs page`
gpus       what gpuload says of this node
shots/     pictures, of made-up data: `python -m tests.page.shots`
assets/    those files; `assets/vendor` holds the libraries, with where they are from
"""
