-- Quarto's Markdown dialect on plain pandoc: numbers, cross-references, callouts, tabsets, folds, margin notes.
--
-- The document is one page of the book; BOOK_CONTEXT says which. It is shown twice: as HTML, for the site and the EPUB, and in
-- typst's language, for the PDF. Marks stand for what other pages decide (tools/pandoc.py fills them in), and in the HTML for
-- what the EPUB shows otherwise. The first line says what the page defines and what it refers to, and holds the page for paper.

local html, typst                                                -- which of the two is being made

local NAMES = { fig = 'Figure', tbl = 'Table', eq = 'Equation', sec = 'Section', lst = 'Listing' }
local CALLOUTS = { note = 'Note', tip = 'Tip', warning = 'Warning', caution = 'Caution', important = 'Important' }

local context = pandoc.json.decode(os.getenv 'BOOK_CONTEXT', false)
local chapter = { number = context.place.number, page = context.place.page, appendix = context.place.appendix == 'true' }
local labels, headings, cites, twice, counts, levels, seen, tabsets

local function kind(id) return id:match '^(%a+)%-' end
local function raw(text) return pandoc.RawBlock(typst and 'typst' or 'html', text) end

-- In the HTML: what the site shows, and what the EPUB shows in its place.
local SITE, BOOK, END = '\u{e002}', '\u{e003}', '\u{e004}'
local function either(site, book) return SITE .. site .. BOOK .. (book or '') .. END end
local function either_blocks(site, book)
  local out = pandoc.Blocks { raw(SITE) }
  out:extend(site)
  out:insert(raw(BOOK))
  out:extend(book)
  out:insert(raw(END))
  return out
end

-- 1. Put every construct into one shape ---------------------------------------------------------------------------

local function starts_with_header(div) return div.content[1] and div.content[1].tag == 'Header' end

-- Each tab becomes a div with its title in an attribute, so that its heading is never numbered.
local function split_tabs(div)
  if not starts_with_header(div) then return nil end
  local level, tabs = div.content[1].level, pandoc.Blocks {}
  for _, block in ipairs(div.content) do
    if block.tag == 'Header' and block.level == level then
      tabs:insert(pandoc.Div({ pandoc.Div({ pandoc.Plain(block.content) }, { class = 'tab-title' }) }, { class = 'tab' }))
    else
      tabs[#tabs].content:insert(block)
    end
  end
  div.content = tabs
  return div
end

local function callout_type(div)
  for _, class in ipairs(div.classes) do
    local type = class:match '^callout%-(%a+)$'
    if CALLOUTS[type] then return type end
  end
end

-- The title of a callout is its attribute, or its first heading, or the name of its kind.
local function callout_title(div)
  local title = div.attributes.title
  if title then
    div.attributes.title = nil
    return pandoc.utils.blocks_to_inlines(pandoc.read(title, 'markdown').blocks)
  end
  if starts_with_header(div) then return div.content:remove(1).content end
  return pandoc.Inlines { pandoc.Str(CALLOUTS[callout_type(div)]) }
end

-- A drawing inside HTML, as a picture that any format can show; pandoc's reader would lose its title and its `viewBox`.
local function as_picture(svg)
  local title = svg:match 'aria%-label="([^"]*)"' or ''
  return ('<img src="data:image/svg+xml,%s" alt="%s">'):format(svg:gsub('[^%w]', function(c) return ('%%%02X'):format(c:byte()) end), title)
end

-- Tables that code put out become tables of the book; other HTML stays as it is on the site and is read elsewhere.
local function read_output(div)
  return div:walk {
    RawBlock = function(block)
      if block.format ~= 'html' then return nil end
      local text = block.text:gsub('<style.-</style>', ''):gsub('<script.-</script>', ''):gsub('<svg .-</svg>', as_picture)
      local blocks = pandoc.read(text, 'html').blocks
      return html and not block.text:match '<table' and either_blocks({ block }, blocks) or blocks
    end,
  }
end

-- `.content-visible when-format="html"` and its relatives. To Quarto an EPUB is "html" too; "html:js" is the site alone.
local SHOWS = { site = { html = true, ['html:js'] = true }, epub = { html = true, epub = true }, paper = { typst = true, pdf = true } }
local function is_shown(div, where)
  local names, when, unless = SHOWS[where], div.attributes['when-format'], div.attributes['unless-format']
  local yes = (not when or names[when]) and not (unless and names[unless])
  return (yes or false) == div.classes:includes 'content-visible'
end

local function shown(div)
  if typst then return is_shown(div, 'paper') and div.content or {} end
  local site, book = is_shown(div, 'site'), is_shown(div, 'epub')
  if site == book then return site and div.content or {} end
  return either_blocks(site and div.content or {}, book and div.content or {})
end

local VOID = pandoc.List { 'area', 'base', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'track', 'wbr' }
local OPTIONAL = pandoc.List { 'p', 'li', 'dt', 'dd', 'tr', 'td', 'th', 'thead', 'tbody', 'tfoot', 'colgroup', 'option' }

-- Which elements of a list hold a tag whose partner is not in the list.
local function unpaired(list)
  local open, lost = pandoc.List {}, {}
  for i, element in ipairs(list) do
    local is_html = (element.tag == 'RawInline' or element.tag == 'RawBlock') and element.format == 'html'
    local text = is_html and not element.text:match '<s[ct][ry][il][pe]' and element.text:gsub('<!%-%-.-%-%->', '') or ''
    for slash, name, rest in text:gmatch '<(/?)(%a[%w-]*)([^>]*)>' do
      name = name:lower()
      local alone = VOID:includes(name) or OPTIONAL:includes(name) or rest:match '/$'
      if slash == '' and not alone then
        open:insert { name, i }
      elseif not alone and #open > 0 and open[#open][1] == name then
        open:remove()
      elseif not alone then
        lost[i] = true
      end
    end
  end
  for _, tag in ipairs(open) do lost[tag[2]] = true end
  return lost
end

-- A tag that is never closed would swallow what follows it, and make an EPUB unreadable.
local function drop_unpaired(list)
  local lost = unpaired(list)
  return next(lost) and list:filter(function(_, i) return not lost[i] end) or nil
end

-- HTML that an author wrote by hand is for the site: in a book it may not be well-formed, and its pictures would be missing.
local function drop_html(block)
  if block.format ~= 'html' or block.text == SITE or block.text == BOOK or block.text == END then return nil end
  return html and raw(either(block.text)) or {}
end

-- In a book, of the tags within a sentence, those that are sure to be well-formed.
local function keep_simple(inline)
  if inline.format ~= 'html' then return nil end
  if inline.text:match '^<!%-%-' then return {} end
  if inline.text:match '^<[bB][rR]' then return pandoc.LineBreak() end
  if inline.text:match '^</?%l+>$' then return inline end
  return html and pandoc.RawInline('html', either(inline.text)) or {}
end

local suspicious                                                 -- whether a piece of HTML has a tag without its partner
local function look(element) suspicious = suspicious or next(unpaired { element }) ~= nil end
local outputs = {
  RawInline = look, RawBlock = look,
  Div = function(div) return div.classes:includes 'cell-output' and read_output(div) or nil end,
}

local paired = { Inlines = drop_unpaired, Blocks = drop_unpaired }

local normalize = {
  RawBlock = drop_html,
  RawInline = keep_simple,
  Div = function(div)
    if div.classes:includes 'panel-tabset' then return split_tabs(div) end
    if callout_type(div) then
      div.content:insert(1, pandoc.Div({ pandoc.Plain(callout_title(div)) }, { class = 'callout-title' }))
      return div
    end
    if div.classes:includes 'content-visible' or div.classes:includes 'content-hidden' then return shown(div) end
  end,
  Image = function(image)
    local alt = image.attributes['fig-alt'] or image.attributes.alt
    if not alt then return nil end
    image.caption, image.attributes['fig-alt'], image.attributes.alt = pandoc.Inlines { pandoc.Str(alt) }, nil, nil
    return image
  end,
}

-- 2. Number everything in reading order ----------------------------------------------------------------------------

local function register(id, type, number)
  if labels[id] then twice[#twice + 1] = id end
  labels[id] = { kind = type, number = number, page = chapter.page }
  return number
end

local function next_number(type)
  counts[type] = (counts[type] or 0) + 1
  return (chapter.number ~= '' and chapter.number .. '.' or '') .. counts[type]
end

-- 1.2.3, counted from the chapter's number; "" for a heading without one.
local function heading_number(header)
  if chapter.number == '' or header.classes:includes 'unnumbered' or header.level > context.number_depth then return '' end
  if header.level == 1 then return chapter.number end
  levels[header.level] = (levels[header.level] or 0) + 1
  for level = header.level + 1, 6 do levels[level] = nil end
  local parts = { chapter.number }
  for level = 2, header.level do parts[#parts + 1] = levels[level] or 0 end
  return table.concat(parts, '.')
end

local function heading_kind(header)
  if header.level > 1 then return 'Section' end
  return chapter.appendix and 'Appendix' or 'Chapter'
end

-- A name that no other place has: on its page, and on paper, where all pages are one, in the book.
local function own(id) return typst and not NAMES[kind(id) or ''] and chapter.page:match '[^/]*$' .. '-' .. id or id end
local function unique(id)
  id = own(id)
  local name, n = id, 1
  while seen[name] do name, n = id .. '-' .. n, n + 1 end
  seen[name] = true
  return name
end

local function number_heading(header)
  local number = heading_number(header)
  if seen[own(header.identifier)] then twice[#twice + 1] = header.identifier end
  header.identifier = unique(header.identifier)
  if number == '' then register(header.identifier, '', pandoc.utils.stringify(header.content))      -- references name it by its words
  else register(header.identifier, heading_kind(header), number) end
  headings[#headings + 1] = { level = header.level, id = header.identifier, number = number, text = pandoc.utils.stringify(header.content) }
  if number ~= '' then
    local class = header.level == 1 and 'chapter-number' or 'header-section-number'
    local name = (header.level == 1 and chapter.appendix and 'Appendix\u{a0}' or '') .. number
    header.content:insert(1, pandoc.Span({ pandoc.Str(name) }, { class = class }))
    header.content:insert(2, pandoc.Str(header.level == 1 and '\u{a0}\u{a0}' or '\u{a0}'))
  end
  return header, false
end

local function with_label(type, number, inlines)
  local caption = pandoc.Inlines { pandoc.Span({ pandoc.Str(NAMES[type] .. '\u{a0}' .. number .. (#inlines > 0 and ':' or '')) }, { class = 'caption-label' }) }
  if #inlines > 0 then caption:insert(pandoc.Space()) end
  caption:extend(inlines)
  return pandoc.Caption { pandoc.Plain(caption) }
end

local function is_float(block)
  return (block.tag == 'Div' or block.tag == 'Figure') and NAMES[kind(block.identifier) or '']
end

-- The caption is the last paragraph, the caption of a picture or a table inside, or nothing.
local function take_caption(div)
  local last = div.content[#div.content]
  if last and (last.tag == 'Para' or last.tag == 'Plain') and not (last.content[1] and last.content[1].tag == 'Image') then
    return div.content:remove().content
  end
  local found = pandoc.Inlines {}
  div.content = div.content:walk {
    Figure = function(f) found = pandoc.utils.blocks_to_inlines(f.caption.long); return f.content end,
    Table = function(t) found = pandoc.utils.blocks_to_inlines(t.caption.long); t.caption = pandoc.Caption {}; return t end,
  }
  return found
end

local function panel(block, type, number, index)
  local letter = '(' .. string.char(96 + index) .. ')'
  if NAMES[kind(block.identifier) or ''] then register(block.identifier, type, number .. ' ' .. letter) end
  local text = block.tag == 'Figure' and pandoc.utils.blocks_to_inlines(block.caption.long) or take_caption(block)
  local caption = pandoc.Inlines { pandoc.Str(letter), pandoc.Space() }
  caption:extend(text)
  return pandoc.Figure(block.content, pandoc.Caption { pandoc.Plain(caption) }, pandoc.Attr(block.identifier, { 'panel' }))
end

-- A `#fig-` or `#tbl-` div, with panels when it holds labelled parts.
local function float(div, type)
  local number = next_number(type)
  register(div.identifier, type, number)
  local caption, panels, body = take_caption(div), 0, pandoc.Blocks {}
  for _, block in ipairs(div.content) do
    if is_float(block) then
      panels = panels + 1
      block = panel(block, type, number, panels)
    end
    body:insert(block)
  end
  local columns = tonumber(div.attributes['layout-ncol']) or panels
  if columns > 1 then
    body = pandoc.Blocks { pandoc.Div(body, pandoc.Attr('', { 'panel-grid' }, { style = '--columns: ' .. columns })) }
  end
  return pandoc.Figure(body, with_label(type, number, caption), pandoc.Attr(div.identifier, { type .. '-float' }))
end

local function number_figure(figure)
  if kind(figure.identifier) ~= 'fig' or figure.classes:includes 'panel' then return nil end
  local number = register(figure.identifier, 'fig', next_number 'fig')
  figure.caption = with_label('fig', number, pandoc.utils.blocks_to_inlines(figure.caption.long))
  figure.classes:insert 'fig-float'
  return figure, false
end

-- A pipe table whose caption ends in {#tbl-x}.
local function number_table(tbl)
  local id, inlines = tbl.identifier, pandoc.utils.blocks_to_inlines(tbl.caption.long)
  local last = inlines[#inlines]
  if id == '' and last and last.tag == 'Str' then
    id = last.text:match '^{#(tbl%-[%w-]+)}$' or ''
    if id ~= '' then inlines:remove(); if #inlines > 0 then inlines:remove() end end
  end
  if kind(id) ~= 'tbl' then return nil end
  local number = register(id, 'tbl', next_number 'tbl')
  tbl.identifier, tbl.caption = '', pandoc.Caption {}
  return pandoc.Figure({ tbl }, with_label('tbl', number, inlines), pandoc.Attr(id, { 'tbl-float' })), false
end

local function number_listing(code)
  if kind(code.identifier) ~= 'lst' then return nil end
  local id, text = code.identifier, code.attributes['lst-cap'] or ''
  local number = register(id, 'lst', next_number 'lst')
  code.identifier, code.attributes['lst-cap'] = '', nil
  local caption = pandoc.utils.blocks_to_inlines(pandoc.read(text, 'markdown').blocks)
  return pandoc.Figure({ code }, with_label('lst', number, caption), pandoc.Attr(id, { 'lst-float' })), false
end

local function equation(math, id)
  local number = register(id, 'eq', next_number 'eq')
  math.text = math.text:gsub('%s+$', '')
  if typst then
    return pandoc.Inlines { pandoc.RawInline('typst', ('#math.equation(block: true, numbering: _ => [(%s)], [ '):format(number)),
      math, pandoc.RawInline('typst', (' ])<%s>'):format(id)) }
  end
  math.text = math.text .. ' \\qquad(' .. number .. ')'      -- as Quarto writes it; tools/finish.py takes it apart again
  return pandoc.Inlines { pandoc.Span({ math }, pandoc.Attr(id)) }
end

-- `$$ ... $$ {#eq-x}`, which tools/cells.py has made a span.
local function number_equation(span)
  local math = span.content[1]
  if kind(span.identifier) ~= 'eq' or not math or math.tag ~= 'Math' then return nil end
  return equation(math, span.identifier), false
end

local number = {
  traverse = 'topdown',
  Header = number_heading,
  Figure = number_figure,
  Table = number_table,
  CodeBlock = number_listing,
  Span = number_equation,
  Div = function(div)
    local type = kind(div.identifier)
    if type == 'fig' or type == 'tbl' then return float(div, type) end
    if div.classes:includes 'cell' then
      div.identifier = unique(div.identifier)
      return div
    end
  end,
}

-- 3. Resolve references and links ----------------------------------------------------------------------------------

-- A mark stands for the words of a reference or a citation; its link is resolved like any other.
local function mark(text)
  text = '\u{e000}' .. text .. '\u{e001}'
  return typst and pandoc.RawInline('typst', text) or pandoc.Str(text)
end

local function reference(citation)
  local id, short = citation.id, citation.mode == 'SuppressAuthor'
  if not NAMES[kind(id) or ''] then return nil end
  return pandoc.Link({ mark((short and '-' or '') .. id) }, '#' .. id, '', { class = 'quarto-xref' })
end

local function resolve_cite(cite)
  local out = pandoc.Inlines {}
  for _, citation in ipairs(cite.citations) do
    local link = reference(citation)
    if not link then
      cites[#cites + 1] = pandoc.Para { cite }
      return mark(#cites - 1)
    end
    if #out > 0 then out:extend { pandoc.Str ',', pandoc.Space() } end
    out:insert(link)
  end
  return out
end

-- On paper a link within the page follows its target's name; where one to another page leads is filled in later.
local function resolve_link(link)
  local id = typst and link.target:match '^#(.+)$'
  if not id or not seen[own(id)] then return nil end
  link.target = '#' .. own(id)
  return link
end

-- typst wants a file where a picture stands in the text itself.
local function stored(image)
  local mime, content = pandoc.mediabag.fetch(image.src)
  local name = context.pictures .. '/' .. pandoc.utils.sha1(content):sub(1, 16) .. '.' .. (mime:match '^image/(%a+)' or 'png')
  local file = assert(io.open(name, 'wb'))
  file:write(content)
  file:close()
  image.src = '/' .. name
  return image
end

-- Pictures of cells lie in one folder; others are seen from the page's folder. typst sees all from the root.
local function resolve_image(image)
  if typst and image.src:match '^data:' then return stored(image) end
  if image.src:match '^%a+:' then return nil end
  local name = image.src:match '^pictures/(.*)$'
  if html then
    image.src = name and context.up .. image.src or image.src
  else
    local path = name and context.pictures .. '/' .. name or pandoc.path.join { pandoc.path.directory(chapter.page), image.src }
    image.src = '/' .. pandoc.path.normalize(path)
  end
  return image
end

local resolve = { Cite = resolve_cite, Link = resolve_link, Image = resolve_image }

-- 4. Give every construct the form of this format ------------------------------------------------------------------

local function take_title(div)
  return div.content:remove(1).content[1].content
end

local function typst_call(name, title, body)
  local out = pandoc.Blocks { raw('#' .. name .. '['), pandoc.Plain(title), raw ']['  }
  out:extend(body)
  out:insert(raw ']')
  return out
end

local function show_callout(div)
  local type, title, collapse = callout_type(div), take_title(div), div.attributes.collapse
  if typst then return typst_call(('callout("%s")'):format(type), title, div.content) end
  local body = pandoc.Div(div.content, { class = 'callout-body' })
  local attr = pandoc.Attr(div.identifier, { 'callout', 'callout-' .. type })
  if collapse then
    local id = div.identifier ~= '' and ' id="' .. div.identifier .. '"' or ''
    local out = pandoc.Blocks { raw(either(('<details class="callout callout-%s"%s%s><summary class="callout-header">'):format(type, id, collapse == 'false' and ' open' or ''),
      ('<div class="callout callout-%s"%s><div class="callout-header">'):format(type, id))) }
    out:extend { pandoc.Plain(title), raw(either('</summary>', '</div>')), body, raw(either('</details>', '</div>')) }
    return out
  end
  return pandoc.Div({ pandoc.Div({ pandoc.Plain(title) }, { class = 'callout-header' }), body }, attr)
end

local function show_tabset(div)
  local out = pandoc.Blocks {}
  if typst then
    for _, tab in ipairs(div.content) do
      out:insert(pandoc.Para { pandoc.Strong(take_title(tab)) })
      out:extend(tab.content)
    end
    return out
  end
  tabsets = tabsets + 1
  out:insert(raw(either '<div class="tabs">'))
  for i, tab in ipairs(div.content) do
    local id = ('tab-%d-%d'):format(tabsets, i)
    out:insert(raw(either(('<input type="radio" name="tabs-%d" id="%s"%s><label for="%s">'):format(tabsets, id, i == 1 and ' checked' or '', id), '<p><strong>')))
    out:insert(pandoc.Plain(take_title(tab)))
    out:extend { raw(either('</label>', '</strong></p>')), pandoc.Div(tab.content, { class = 'tab-pane' }) }
  end
  out:insert(raw(either '</div>'))
  return out
end

-- On paper nothing opens: of what is folded, solutions are printed, the code of figures is left out, the rest is named.
local function leave_out(div, summary)
  local shown = div.content:filter(function(block) return block.tag ~= 'CodeBlock' end)
  if not summary:match 'figure' then shown:insert(1, pandoc.Div({ pandoc.Plain { pandoc.Str(summary .. ': in the notebook.') } }, { class = 'fold-title' })) end
  div.content = shown
  return div
end

local function show_fold(div)
  local summary, state = div.attributes['code-summary'] or 'Code', div.attributes['code-fold']
  div.attributes['code-summary'], div.attributes['code-fold'] = nil, nil
  if typst and state == 'true' and summary ~= 'Solution' then return leave_out(div, summary) end
  for i, block in ipairs(div.content) do
    if block.tag == 'CodeBlock' then
      if html then
        local open = state == 'show' and ' open' or ''
        local label = summary:gsub('&', '&amp;'):gsub('<', '&lt;')
        div.content:insert(i + 1, raw(either '</details>'))
        div.content:insert(i, raw(either(('<details class="code-fold"%s><summary>%s</summary>'):format(open, label), '<div class="fold-title">' .. label .. '</div>')))
      else
        div.content:insert(i, pandoc.Div({ pandoc.Plain { pandoc.Str(summary) } }, { class = 'fold-title' }))
      end
      return div
    end
  end
end

-- On paper a bar marks what was printed; figures, tables and sentences stand as those of the author.
local function show_output(div)
  local printed = div.content:find_if(function(block) return block.tag == 'CodeBlock' end)
  return printed and typst_call('output', {}, div.content) or div.content
end

local function show_margin(div)
  if typst then return typst_call('aside', {}, div.content) end
  local out = pandoc.Blocks { raw '<aside class="margin-note">' }
  out:extend(div.content)
  out:insert(raw '</aside>')
  return out
end

local function show_grid(div)
  local columns = div.attributes['layout-ncol']
  if not columns then return nil end
  div.attributes['layout-ncol'], div.attributes.style = nil, '--columns: ' .. columns
  div.classes:insert 'panel-grid'
  return div
end

local present = {
  Div = function(div)
    if callout_type(div) and div.content[1] and div.content[1].tag == 'Div' and div.content[1].classes:includes 'callout-title' then return show_callout(div) end
    if div.classes:includes 'panel-tabset' then return show_tabset(div) end
    if div.classes:includes 'column-margin' then return show_margin(div) end
    if div.attributes['code-fold'] then return show_fold(div) end
    if typst and div.classes:includes 'cell-output' then return show_output(div) end
    if typst and div.classes:includes 'fold-title' then return typst_call('fold', div.content[1].content, {}) end
    return show_grid(div)
  end,
  Table = function(tbl)
    if html then return pandoc.Div({ tbl }, { class = 'table-scroll' }) end
  end,
}

-- The walk over the page -------------------------------------------------------------------------------------------

local function cited(doc)
  local found = {}
  doc:walk {
    Cite = function(cite) for _, c in ipairs(cite.citations) do found[#found + 1] = c.id end end,
    Link = function(link)
      local id = link.target:match '^#(.+)$'
      if id and NAMES[kind(id) or ''] then found[#found + 1] = id end
    end,
  }
  return found
end

local function show(doc, format)
  html, typst = format == 'html', format == 'typst'
  labels, headings, cites, twice, counts, levels, seen, tabsets = {}, {}, {}, {}, {}, {}, {}, 0
  suspicious = false
  local blocks = doc.blocks:walk(outputs)
  return (suspicious and blocks:walk(paired) or blocks):walk(normalize):walk(number):walk(resolve):walk(present)
end

function Pandoc(doc)
  local paper = pandoc.write(pandoc.Pandoc(show(doc:clone(), 'typst')), 'typst-citations', { highlight_method = 'idiomatic' })
  local names = cited(doc)
  local blocks = show(doc, 'html')
  local citations = pandoc.write(pandoc.Pandoc(cites), 'json')
  blocks:insert(1, raw(pandoc.json.encode { labels = labels, headings = headings, cited = names, cites = citations, twice = twice, paper = paper }))
  return pandoc.Pandoc(blocks, doc.meta)
end
