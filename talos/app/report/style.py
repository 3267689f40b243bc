"""The page's colours, light and dark, and its style sheet."""

__all__ = ["CSS", "EDGE", "GREY", "INK", "LINE", "METHODS", "VARIABLES"]

_COLOURS = {  # name: light, dark
    "ink": ("#1f2937", "#e5e7eb"),
    "soft": ("#5b6676", "#a8b3c2"),
    "line": ("#e2e8f0", "#2b3646"),
    "edge": ("#cbd5e1", "#4b5a6e"),
    "m0": ("#0f766e", "#2dd4bf"),
    "m1": ("#c2410c", "#fb923c"),
    "m2": ("#4f46e5", "#a5b4fc"),
    "m3": ("#a16207", "#facc15"),
    "m4": ("#be185d", "#f472b6"),
    "m5": ("#0369a1", "#38bdf8"),
    "m6": ("#4d7c0f", "#a3e635"),
    "m7": ("#7c2d12", "#d6a77a"),
}
_SURFACES = {
    "page": ("#ffffff", "#10161f"),
    "panel": ("#f8fafc", "#18202c"),
    "shade": ("#00000038", "#ffffff38"),
}
INK, GREY, LINE, EDGE, *METHODS = (light for light, _ in _COLOURS.values())
VARIABLES = {light: f"var(--{name})" for name, (light, _) in _COLOURS.items()}
"""Of each colour that figures are drawn with, the CSS variable that stands for it on the page."""


def _root(theme: int) -> str:
    every = (_COLOURS | _SURFACES).items()
    return ":root{" + "".join(f"--{name}:{pair[theme]};" for name, pair in every) + "}"


CSS = (
    f"{_root(0)}\n@media(prefers-color-scheme:dark){{{_root(1)}}}\n:root{{color-scheme:light dark}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.2rem 0 1rem;
text-wrap:balance}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .4rem}
.eyebrow{color:var(--m0);font-weight:600;font-size:.85rem;margin:0}
.lead{font-size:1.2rem;line-height:1.5;max-width:56rem;margin-bottom:.6rem}
.more{color:var(--soft);max-width:52rem;margin-top:0}
section{border-top:1px solid var(--line);padding-top:1.6rem;margin-top:2.2rem}
section>p{color:var(--soft);max-width:52rem;margin:.2rem 0 1rem}
header h2{margin:1.6rem 0 .2rem}
h3{font-size:1.02rem;margin:1.4rem 0 .5rem;overflow-wrap:anywhere}
.best{border-bottom:3px solid var(--m0);padding-bottom:.1rem}
details{margin-top:.9rem}
details>.wide{margin-top:.6rem}
.wide+p{margin-top:.8rem}
summary{color:var(--soft);font-size:.9rem;cursor:pointer;width:fit-content}
details p,dl{color:var(--soft);font-size:.9rem;max-width:52rem;margin:.6rem 0}
dt{font-weight:600;color:var(--ink)}
dd{margin:0 0 .4rem 1rem}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;background:
linear-gradient(to left,var(--page) 40%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to left,var(--shade),transparent) right/.9rem 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);font-size:.82rem;text-align:left;vertical-align:bottom}
th,td{padding:.42rem .6rem;border-bottom:1px solid var(--line)}
tr:last-child>td{border-bottom:0}
th:first-child,td:first-child{position:sticky;left:0;background:var(--page)}
td.n,th.n{text-align:right;white-space:nowrap}
th.n{white-space:normal}
td small{color:var(--soft);font-size:.8rem}
header td small{display:block}
.dot{display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.4em}
.long{min-width:15rem}
.row{display:flex;align-items:baseline;min-width:8rem}
.row .dot{flex:none}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));
gap:1.5rem 2rem;align-items:start;margin-top:1rem}
.grid>*{min-width:0}
.many td small{display:block}
figure{margin:0}
.grid+.wide,.grid+details+.wide{margin-top:1.2rem}
figure svg{display:block;width:100%;height:auto;max-width:520px}
figure svg text{font-family:inherit!important}
.step{margin:.9rem 0 .25rem;font-size:.92rem}
pre{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;margin:0;
padding:.65rem .9rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.86rem}
@media(max-width:560px){main{padding:1.2rem .9rem 3rem}.lead{font-size:1.05rem}
table{font-size:.86rem}
td small{display:block}th,td{padding:.42rem .55rem}
.many::before{content:"scroll \\2192";position:sticky;left:0;display:block;width:fit-content;
padding:.3rem .55rem 0;color:var(--soft);font-size:.8rem}
@supports(animation-timeline:scroll()){.many::before{font-size:0;padding:0;
animation:says linear both;animation-timeline:scroll(nearest inline)}}}
@keyframes says{from,to{font-size:.8rem;padding:.3rem .55rem 0}}
@media print{section{break-inside:avoid}}
"""
)
