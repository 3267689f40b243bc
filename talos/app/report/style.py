"""The page's style sheet."""

__all__ = ["CSS"]

CSS = """
:root{color-scheme:light;--ink:#1f2937;--soft:#5b6676;--line:#e2e8f0;--panel:#f8fafc;--mark:#0f766e}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.2rem 0 1rem;
text-wrap:balance}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .4rem}
.eyebrow{color:var(--mark);font-weight:600;font-size:.85rem;margin:0}
.lead{font-size:1.2rem;line-height:1.5;max-width:56rem;margin-bottom:.6rem}
.more{color:var(--soft);max-width:52rem;margin-top:0}
section{border-top:1px solid var(--line);padding-top:1.6rem;margin-top:2.2rem}
section>p{color:var(--soft);max-width:52rem;margin:.2rem 0 1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.75rem;
margin-top:1.4rem}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:.6rem;
padding:.8rem 1rem}
.tiles b{display:block;font-size:1.55rem;letter-spacing:-.02em;line-height:1.2}
.tiles span{color:var(--soft);font-size:.85rem;line-height:1.3;display:block}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);font-size:.82rem;text-align:left;vertical-align:bottom}
th,td{padding:.42rem .7rem .42rem 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;white-space:nowrap;padding:.42rem 0 .42rem .9rem}
th.n{white-space:normal}
td small{color:var(--soft);font-size:.8rem}
.dot{display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.4em}
.long{min-width:15rem}
td .method{white-space:nowrap}
.pair,.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));
gap:1.5rem 2rem;align-items:start;margin-top:1rem}
.pair>*,.grid>*{min-width:0}
figure{margin:0}
figure svg{display:block;width:100%;height:auto;max-width:600px}
figure svg text{font-family:inherit!important}
figcaption{color:var(--soft);font-size:.85rem;margin-top:.3rem}
.step{margin:.9rem 0 .25rem;font-size:.92rem}
pre{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;margin:0;
padding:.65rem .9rem;overflow-x:auto;font-size:.86rem}
@media(max-width:520px){main{padding:1.2rem .9rem 3rem}table{font-size:.86rem}
td small{display:block}td.n,th.n{padding-left:.55rem}}
@media print{section{break-inside:avoid}}
"""
