"""The look of the report: one style sheet, system fonts, light and dark by the reader's own setting."""

from lightspan.core.drawing import COLOURS

_RUNS = ";".join(f"--run{at}:{colour}" for at, colour in enumerate(COLOURS))
CSS = (
    """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--rule:#e3e5e8;--grid:#eceef0;
--mark:#e7f3ec;--good:#14683f;
"""
    + _RUNS
    + """}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1c2024;--ink:#e8eaed;--soft:#9aa4b0;--rule:#30363d;
--grid:#282d33;--mark:#1b3527;
--good:#7fd6a6;--run0:#79aaff;--run1:#ff9d5c;--run2:#4fd1ae;--run3:#f08bdc;--run4:#dcc14a;--run5:#b3a5ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 14px;letter-spacing:-.01em}
p,footer,summary{overflow-wrap:anywhere}
p{margin:0 0 8px}
.lead{color:var(--soft);max-width:72ch}
.lead b{color:var(--ink);font-weight:600}
.legend{position:sticky;top:0;z-index:1;max-height:30vh;overflow-y:auto;
display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px -20px 0;
padding:10px 20px;background:var(--paper);
border-bottom:1px solid var(--rule);font-size:.92rem;font-weight:600}
.legend span{display:inline-flex;align-items:center;gap:8px;overflow-wrap:anywhere}
.key{flex:none;display:inline-block;width:20px;height:0;border-top:3px solid}
.key.dashed{border-top-style:dashed}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 16px;text-align:right;vertical-align:top;border-top:1px solid var(--rule)}
thead th{border-top:0;font-weight:600;overflow-wrap:break-word;min-width:7em;max-width:16em}
th:first-child{text-align:left;font-weight:500}
tbody th small,td small{color:var(--soft);font-weight:400;font-size:.82rem;white-space:nowrap}
td small{display:block}
td.best .value{color:var(--good);font-weight:650}
td.best{background:var(--mark)}
.value{white-space:nowrap}
.bar{display:block;height:4px;margin:5px 0 0 auto;border-radius:2px;min-width:2px;opacity:.75}
.badge{display:inline-block;margin-left:6px;padding:0 7px;border:1px solid var(--run1);border-radius:9px;
color:var(--run1);font-size:.74rem;font-weight:500}
.sections{display:grid;gap:0 16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
section{min-width:0}
section.wide{grid-column:1/-1}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:16px}
.chart{margin:0;padding:12px 14px 10px;background:var(--card);border:1px solid var(--rule);border-radius:10px;
min-width:0}
.chart figcaption{font-size:.95rem;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}.chart>svg{overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
.ended{position:sticky;top:0;z-index:2;padding:8px 12px;background:var(--mark);border-radius:8px}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--soft);fill:none;opacity:.55}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{fill:none;stroke-width:1;opacity:.28}
.band{opacity:.16;stroke:none}
.hit rect{fill:transparent}
.tip{visibility:hidden;pointer-events:none}
.tip text{font-size:12.5px;font-weight:600;fill:var(--ink);font-variant-numeric:tabular-nums;paint-order:stroke;
stroke:var(--card);stroke-width:5px}
.hit:hover .tip{visibility:visible}
.note{margin:4px 0 0;color:var(--soft);font-size:.82rem;line-height:1.35}
table.plain{font-size:.88rem}
table.plain td{text-align:left;overflow-wrap:anywhere;min-width:9em}
table.plain th:first-child{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem;
overflow-wrap:anywhere;min-width:11em}
table.plain thead th{text-align:left}
table.plain td.shared{color:var(--soft)}
table.heat{width:auto;margin:0 auto}table.heat td{text-align:center;min-width:5.5em;border:1px solid var(--rule);
background:color-mix(in srgb,var(--good) var(--share),var(--card))}
table.heat th{font-weight:500;text-align:center}table.heat td.best{outline:2px solid var(--good);outline-offset:-2px}
table.heat caption{caption-side:top;padding:10px 12px 6px;font-size:.88rem;color:var(--soft)}
.heats{margin-top:12px;display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start;margin-bottom:16px}.heats>.scroll{max-width:100%}
table.rank td,table.rank th{text-align:right;padding:6px 12px;min-width:0;white-space:nowrap}
table.rank tr>:nth-child(2){text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:8em}
table.rank th[scope=row]{font-weight:500}
table.rank td.setting{white-space:normal;overflow-wrap:break-word;max-width:14em}
details{margin-top:12px}
summary{cursor:pointer;color:var(--soft);font-size:.92rem;padding:4px 0}
pre{margin:0;padding:14px;overflow:auto;max-height:26em;background:var(--card);border:1px solid var(--rule);
border-radius:10px;
font:.82rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
h3{font-size:1rem;margin:20px 0 8px}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px}
.pictures img{max-width:100%;height:auto;border:1px solid var(--rule);border-radius:10px;background:#fff}
.pictures p{font-size:.9rem;font-weight:600}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px}
.samples>div{min-width:0}
.samples p{font-size:.9rem;font-weight:600}
footer{margin-top:48px;padding-top:14px;border-top:1px solid var(--rule);color:var(--soft);font-size:.85rem}
@media (max-width:560px){main{padding:20px 14px 48px}.legend{margin:14px -14px 0;padding:8px 14px}
h1{font-size:1.5rem}th,td{padding:8px 10px}
thead th{min-width:5.5em}table{font-size:.92rem}.tick,.label{font-size:14px!important}}
@media print{.legend{position:static}.chart{break-inside:avoid}}
"""
)
